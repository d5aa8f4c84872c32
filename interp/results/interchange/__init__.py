"""Score files of other projects: read into a head table, and written from one."""
