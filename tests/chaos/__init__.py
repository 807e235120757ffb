"""Slices of the programs in `bench` that kill, freeze, load or confuse."""
