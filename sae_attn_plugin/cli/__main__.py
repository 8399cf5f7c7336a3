from sae_attn_plugin.cli import main

main()
