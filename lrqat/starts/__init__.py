"""Where training begins: codes and parts that are better than round-to-nearest."""
