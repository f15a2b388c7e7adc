"""How near a student is to its teacher, how readable it is, and the baselines it is held against."""
