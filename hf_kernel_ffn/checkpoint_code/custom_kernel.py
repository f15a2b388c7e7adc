"""Empty in the package. In a checkpoint whose kernel is a user's own, this file is the user's file."""
