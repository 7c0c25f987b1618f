"""The commands that a user types: composing a configuration, launching, dry runs, planning, generating, exporting."""
