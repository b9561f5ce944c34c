"""Decisions: recipes, plans, prices, jobs, and the scheduler that carries them out."""
