"""An audit's figures in the formats of others: CycloneDX, and model cards of Hugging Face."""
