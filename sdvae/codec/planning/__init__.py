"""What a run has to do: which input gives which output, what is up to date, and what is refused."""
