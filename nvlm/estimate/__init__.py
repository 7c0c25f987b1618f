"""What a model and a run take, by arithmetic: parameters, FLOPs, activations, memory, step time, layouts. No torch."""
