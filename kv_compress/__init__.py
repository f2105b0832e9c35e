"""What to keep of keys and values, and how to code it: settings and maths. The runtime stores and moves."""
