"""Videos of records: their headers, which frames are used, and decoding. Imports no torch."""
