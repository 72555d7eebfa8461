//! A vault for programs whose `main` cannot begin with [`vault::init`](cvm_backend_kvm::vault::init).

fn main() {
    cvm_backend_kvm::vault::init();
    eprintln!(
        "cvm-vault is started by virtual machine monitors, see the crate cvm-backend-kvm; it does nothing by itself"
    );
    std::process::exit(2);
}
