"""The commands of `vtc` that run models: options and printing, nothing else."""
