"""The balancer's simulator in parts: what happens (events), who decides (policies, control), and what is played."""
