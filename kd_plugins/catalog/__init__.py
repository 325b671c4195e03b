"""Which distillers there are, what their options are, and where they come from."""
