"""From one layout to another under live requests, and the way back."""
