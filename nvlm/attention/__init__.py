"""Who sees whom, and the kernels that compute it."""
