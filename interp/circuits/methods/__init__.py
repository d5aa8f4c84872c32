"""The methods that rank heads, a file each, and what they alone use."""
