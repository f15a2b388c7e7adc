"""From a teacher to a student: what is read, fitted and put in place."""
