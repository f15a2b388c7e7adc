"""How near a student is to its teacher, how readable it is, and what it is held against."""
