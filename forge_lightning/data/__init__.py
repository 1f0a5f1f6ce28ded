"""LightningDataModules, and loading that resumes mid-epoch."""
