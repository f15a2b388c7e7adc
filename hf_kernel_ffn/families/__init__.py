"""Where the FFNs of any model are, what their weights are, and the classes of a converted model."""
