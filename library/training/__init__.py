"""What any run needs, whatever model it trains: a step and its speed here, and more in folders."""
