"""What a model gives away of canaries: exposure, extraction, and lower bounds on epsilon."""
