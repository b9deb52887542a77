"""The lmms-eval half of `vtc.eval`: wrapped models, local tasks, sweeps over methods and budgets, presets of papers."""
