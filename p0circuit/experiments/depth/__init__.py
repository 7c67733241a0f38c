"""Where the circuit is: which blocks recognise, write, erase and read, found instead of assumed."""
