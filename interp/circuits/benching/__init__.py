"""Circuit methods beside what would refute them: shuffled inputs, rankings that know nothing of the
task, and truths measured in more than one way."""
