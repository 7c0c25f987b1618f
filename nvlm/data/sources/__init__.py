"""The sources of records: a module for each kind of file, and the table of them."""
