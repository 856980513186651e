# Sourced by run_tests.sh: BROWSER, the browser that the tests of pages drive, and BROWSER_DRIVER,
# where one lies beside it. One that is here, else Debian's where root or sudo may install it; else
# BROWSER is empty, and these tests are skipped. BROWSER_TESTS=required: an error in place of that.
find_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable chrome microsoft-edge \
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" \
        "/Applications/Chromium.app/Contents/MacOS/Chromium" \
        "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge"; do
        if command -v "$name" >/dev/null; then command -v "$name"; return; fi
    done
}
export BROWSER=${BROWSER:-$(find_browser)}
if [ -z "$BROWSER" ] && command -v apt-get >/dev/null; then
    as_root=()
    if [ "$(id -u)" != 0 ]; then as_root=(sudo --non-interactive); fi
    if [ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && sudo --non-interactive true 2>/dev/null; }; then
        echo "installing chromium for the tests of pages"
        "${as_root[@]}" apt-get update -q >/dev/null || true
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
            chromium chromium-driver >/dev/null || true
        BROWSER=$(find_browser)
    fi
fi
export BROWSER_DRIVER=${BROWSER_DRIVER:-$(command -v chromedriver || command -v msedgedriver || true)}
if [ -z "$BROWSER" ] && [ "${BROWSER_TESTS:-}" = required ]; then
    echo "error: the tests of pages need a browser: install one (Debian: apt-get install chromium chromium-driver)" >&2
    exit 2
fi
