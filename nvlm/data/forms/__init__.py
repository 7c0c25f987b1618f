"""How the rows of a source become records: one pure function for each form in which users write them."""
