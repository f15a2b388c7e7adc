"""Empty in the package. In a checkpoint with a kernel of the user's own, the user's file."""
