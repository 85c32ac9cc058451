"""What the scripts rely on and nobody reads for pleasure. It never imports the top level."""
