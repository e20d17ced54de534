"""Real ranks: started, held at named points, killed, and inspected afterwards."""
