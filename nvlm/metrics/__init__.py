"""What an answer is worth: published metrics as pure functions, intervals, files of answers. No torch."""
