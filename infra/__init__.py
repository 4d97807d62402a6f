"""What the flow runs on."""
