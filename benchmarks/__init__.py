"""What ``make bench`` runs, and what measures single pieces: programs for people, not part of the package."""
