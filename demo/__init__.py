"""The main job on a toy: ``python -m demo`` trains, merges through the service, and prints what came out."""
