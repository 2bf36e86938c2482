# The formula for a tap of this project, to be completed for its first release. Until then `brew install` refuses it:
# no release has this url or this sha256. Nobody has built it with Homebrew so far. For a release:
#
# 1. Upload the sdist to PyPI. https://pypi.org/project/mlx-gptoss/#files then shows its url and its sha256.
# 2. Copy this file to Formula/mlx-gptoss.rb of the tap's repository, put the two in, and remove these comments.
# 3. `brew update-python-resources mlx-gptoss` writes a `resource` block for each Python package that it needs.
# 4. `brew style mlx-gptoss`, `brew audit --strict --new mlx-gptoss`, `brew install --build-from-source mlx-gptoss`
#    and `brew test mlx-gptoss` check it.
class MlxGptoss < Formula
  include Language::Python::Virtualenv

  desc "Run OpenAI's gpt-oss models on your own machine"
  homepage "https://pypi.org/project/mlx-gptoss/"
  url "https://files.pythonhosted.org/packages/00/00/0000000000000000000000000000000000000000000000000000000000/mlx_gptoss-0.1.0.tar.gz"
  sha256 "0000000000000000000000000000000000000000000000000000000000000000"
  license "Apache-2.0"

  depends_on "pkgconf" => :build
  depends_on "rust" => :build # for llguidance, safetensors and tokenizers
  depends_on arch: :arm64
  depends_on "certifi" => :no_linkage
  depends_on :macos
  depends_on "mlx"
  depends_on "numpy"
  depends_on "pydantic" => :no_linkage
  depends_on "python@3.14"

  # Without hf-xet, which huggingface-hub can do without, models are downloaded over plain HTTPS.
  pypi_packages package_name:     "mlx-gptoss[serve]",
                exclude_packages: %w[certifi hf-xet mlx mlx-metal numpy pydantic pydantic-core]

  def install
    virtualenv_install_with_resources
  end

  def caveats
    <<~EOS
      `brew services start mlx-gptoss` serves the small bundled model on port 8080.
      For another model or other options, let mlx-gptoss install its own service instead:
        mlx-gptoss serve --model openai/gpt-oss-20b --install-service
    EOS
  end

  service do
    run [opt_bin/"mlx-gptoss", "serve"]
    # MLX_GPTOSS_LAUNCHD lets a usage error end with 0, so that it is not repeated.
    environment_variables MLX_GPTOSS_LAUNCHD: "1", PATH: std_service_path_env
    keep_alive successful_exit: false
    throttle_interval 30
    process_type :interactive
    log_path var/"log/mlx-gptoss.log"
    error_log_path var/"log/mlx-gptoss.log"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/mlx-gptoss --version")

    port = free_port
    pid = spawn bin/"mlx-gptoss", "serve", "--port", port.to_s
    begin
      health = shell_output("curl --silent --retry 20 --retry-connrefused http://127.0.0.1:#{port}/health")
      assert_equal "ok", JSON.parse(health)["status"]
    ensure
      Process.kill "TERM", pid
      Process.wait pid
    end
  end
end
