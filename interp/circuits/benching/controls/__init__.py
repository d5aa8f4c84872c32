"""Rankings of heads that know nothing, or little, of the task: a method must beat them."""
