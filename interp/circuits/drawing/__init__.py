"""The picture of a circuit and its section of the report."""
