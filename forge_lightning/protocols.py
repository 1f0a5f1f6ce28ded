"""What a foreign module or datamodule may offer. Structural: nobody has to inherit."""
