"""The proof of an export: reopened, compared weight by weight, measured against the trained model."""
