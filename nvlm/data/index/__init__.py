"""The index of a run's records: what planning needs to know of each, so that no record is read for it."""
