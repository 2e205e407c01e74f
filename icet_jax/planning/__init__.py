"""Whether a run fits machines that are not here."""
