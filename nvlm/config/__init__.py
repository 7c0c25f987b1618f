"""The configuration as frozen values: fields, rules that span several of them, data sheets of GPUs. No torch."""
