from alchemist.server.main import main

if __name__ == "__main__":
    main()
