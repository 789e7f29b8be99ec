"""The three encoders of X-FM, its heads, and the model that joins them. Parameter names are the official ones."""
