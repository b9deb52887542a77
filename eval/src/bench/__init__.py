"""Measuring methods at budgets: cells, answers, times, the floor, decisions alone, and the choice among cells."""
