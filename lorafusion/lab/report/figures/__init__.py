"""A module for each figure, or family of figures: what of a table it shows, and how that is drawn."""
