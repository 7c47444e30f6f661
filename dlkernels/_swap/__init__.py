"""How `dlkernels.swap` changes modules: rules per family, classes made from theirs, forward passes rewritten."""
