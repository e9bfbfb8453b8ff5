"""Know the data first: one look at every picture, and what it says about a collection."""
