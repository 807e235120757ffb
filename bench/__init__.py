"""Programs that one runs by hand: what Holdfast costs, and what it stands. Tests run slices of them."""
