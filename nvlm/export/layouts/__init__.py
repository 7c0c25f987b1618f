"""The layouts of folders that an export may be written in: `form` says what one is, `registry` lists them by name."""
